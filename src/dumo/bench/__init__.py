"""What a machine makes of dumo: training steps by every slope, and sampling; counted, timed, and judged for truth."""
