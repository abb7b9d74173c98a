"""Who answers, what is asked in which order, and what is written down."""
