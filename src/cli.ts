import './cli/status-signals.js'
import { main } from './cli/main.js'

void main(process.argv)
