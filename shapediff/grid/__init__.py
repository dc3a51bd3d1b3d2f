"""Morton-ordered grids: codes, orders, patches and windows as views, and sorted-segment reductions."""
