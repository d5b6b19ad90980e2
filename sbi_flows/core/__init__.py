"""Code that all other packages use: argument checks, errors, matrix precision, files, versions."""
