"""What every service needs to run: settings, logs, metrics, connections, life cycle. No word of voting in here."""
