"""What a trained model costs and does: numbers first, pictures from the numbers."""
