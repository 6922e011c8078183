"""Commands that belong to no other package: doctor, inspect, student."""
