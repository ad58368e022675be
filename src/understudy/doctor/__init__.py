"""`understudy doctor`: what would go wrong with a run, found before it begins. Checks stand by topic in modules;
``catalogue`` lists them and runs them."""
