"""What is taught: pure functions on tensors, each written out by hand once and proven equal to the
library.
"""
