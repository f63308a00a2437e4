"""What is measured on a GPU: `python -m benchmarks.gpu`. On a CPU, `--dry-run` runs the same code at tiny sizes."""
