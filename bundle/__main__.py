from bundle.cli.app import main

main()
