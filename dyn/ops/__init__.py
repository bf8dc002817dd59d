"""Operations: one public function an op, with the readable eager reference beside its fast paths.

`backend="auto"` picks the fastest path for the device; naming one forces it, and a name that does not exist raises.
"""
