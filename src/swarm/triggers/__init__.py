"""Makes tickets automatically: schedules. Imports the store; the engine and the API import it."""
