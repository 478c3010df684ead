"""What makes tickets by itself: schedules. Imports the store; the engine and the API import it."""
