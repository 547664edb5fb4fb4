"""One function per verb, and what they share. Reads like the method section; the only floor that knows them all."""
