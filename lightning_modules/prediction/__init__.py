"""What people get of new photographs: decisions, regions, pictures and a page."""
