"""Names and keywords of other libraries, on our ops."""
