"""An app for stock Flower that sends messages back and forth, to have something to compare with."""
