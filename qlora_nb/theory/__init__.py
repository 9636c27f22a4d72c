"""What is taught: pure functions, each written out by hand once and tested equal to the library."""
