"""Places of bytes: addresses of buckets and web servers, and the one client that reaches them."""
