"""Commands on what runs wrote, or that prepare what they read; nothing else imports them."""
