import { activationCases } from '../activation.js'

export default activationCases('gelu')
