"""The two files that connect a hospital: its request, and the admission that comes back.

Neither holds a secret. A request shows that whoever made it has the signing key and the node's key;
that it has the two keys that receive secrets cannot be shown in one file, and is shown by the first
pairing, which fails without them. Whose keys they are is compared by telephone: a fingerprint.
"""
