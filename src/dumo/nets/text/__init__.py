"""What stands for the condition c in a net that reads text: rows of a table, and the last but none for no caption."""

from dumo.nets.text.learned import Learned as Learned

Text = Learned
