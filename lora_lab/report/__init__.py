"""What trials say together: from runs read back to effects, verdicts and a page. Pure from the trials on."""
