"""What every room stands on: checks, errors, precision, atomic files, records of versions."""
