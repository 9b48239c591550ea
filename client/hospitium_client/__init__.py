"""The hospital's side: data, private training, protection."""
