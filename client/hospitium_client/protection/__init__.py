"""What stands between an update and the outside: the ledger and the mask."""
