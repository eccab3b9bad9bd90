"""Say what is installed here, what mmvig stands in for, and what will not work, with a cure for each.

    python tools/doctor.py

Exits with 0 where training can start, and with 1 where something essential is missing.
"""

from mmvig.compat.doctor import main

if __name__ == '__main__':
    raise SystemExit(main())
