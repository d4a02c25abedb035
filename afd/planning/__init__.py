"""What a run needs, before it runs: parameters, FLOPs, memory, traffic, seconds, money, and what to change.

Pure arithmetic on shapes and settings: nothing here makes a tensor or asks a device.
"""
