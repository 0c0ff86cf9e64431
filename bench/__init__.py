"""Speed, memory and error of the operations, and of what a PyTorch user would write instead."""
