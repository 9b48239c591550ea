"""Our own two paths of the SuperLink's loopback listener."""

ARRIVALS = "/hospitium/arrivals"
"""``GET ARRIVALS?COUNT`` answers once not exactly COUNT answers have arrived, or after a moment."""
POSTED = "/hospitium/posted"
"""``GET POSTED`` wakes up nodes that wait for a message."""
