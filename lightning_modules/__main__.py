from lightning_modules import preemption

if __name__ == "__main__":
    preemption.watch()
    from lightning_modules.cli import main

    main()
