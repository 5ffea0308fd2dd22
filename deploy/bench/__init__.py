"""`splitserve bench`: load on a running cluster, and what its clients see."""
