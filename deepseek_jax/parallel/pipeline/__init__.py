"""Pipelines: schedules as plain data (NumPy only), and the executor that runs one (`executor.py`)."""
