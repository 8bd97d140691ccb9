"""What one asks before paying for hours: doctor, cost, plan, rehearsal, show."""
