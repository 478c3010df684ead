"""Databases as released versions left them, one dump each: every later version migrates them (../test_released.py)."""
