"""Other libraries on the same problem, each as its own users run it, one file a library."""
