"""Where models look: measurements, causal substitution, figures, pages and the explorer."""
