"""From images as they came from their archive to cases."""
