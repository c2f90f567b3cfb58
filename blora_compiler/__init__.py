"""A compiler for transformer compression: one number in, a smaller verified model out."""
