"""The lowest place: rules that every room follows. Needs neither torch nor pandas."""
