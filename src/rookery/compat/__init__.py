"""Names and call signatures of other packages, so that scripts written for them run on this library."""
