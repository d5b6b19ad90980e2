"""What every other room uses: argument checks, errors, matrix precision, atomic files, versions."""
