"""The training loop and what it steers. No Ray and no torch."""
