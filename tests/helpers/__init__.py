"""What several test modules use. No test module imports from another one; fixtures stand in the conftest.py files."""
