"""The words that everything else is said in: spikes, surrogates, neurons, options, errors, plugins."""
