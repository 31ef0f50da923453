"""What every kernel shares: choice of an implementation, and the seams of the Pallas versions."""
