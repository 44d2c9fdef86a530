"""One operation (permute, gather, flip, crop, cut out, scale, convert, lay out), several implementations that agree."""
