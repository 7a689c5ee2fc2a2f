"""Which program works on which keys: equal shares of a step's key tiles, decided on the device.

`reference` holds the arithmetic in plain Python, with every bound and field explained; `triton_launch` is the same in
one small launch per step.
"""
