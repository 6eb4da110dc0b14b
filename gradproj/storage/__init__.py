"""Where bytes lie: addresses of buckets and web servers, and the one client that reaches them."""
