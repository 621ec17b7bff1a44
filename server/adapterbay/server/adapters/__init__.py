"""Adapters in memory: from files to a serving form, in host memory, in device slots."""
