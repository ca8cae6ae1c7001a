"""``appliancectl bench``: closed loops, open loops and MLPerf LoadGen's scenarios over the native socket."""
