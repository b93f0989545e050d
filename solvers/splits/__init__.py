"""How many units of work each of several unequal devices takes."""
