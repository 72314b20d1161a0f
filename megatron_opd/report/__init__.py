"""Reports of runs: what they came to, how sure that is and what it cost, as a page, as figures, and as files for other programs."""
